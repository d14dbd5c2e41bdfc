"""Mixed bit-widths: which linears get how many bits under a budget of bytes."""
