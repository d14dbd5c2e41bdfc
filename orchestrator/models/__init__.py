"""Where models come from and how their weights reach memory."""
