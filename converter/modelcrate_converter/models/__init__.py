"""Plain-torch definitions of the networks that modelcrate converts, with upstream's state-dict names."""
