"""Small PyTorch modules with the released key names, to compare frameworks side by side."""
