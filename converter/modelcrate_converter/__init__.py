"""The build machine's half: checkpoints in, verified bundles out. Nothing heavy is imported here."""
