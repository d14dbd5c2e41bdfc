"""Bundles: what a sweep needs from the Hub, gathered on a connected machine for one that is not."""
