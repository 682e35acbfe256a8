"""Token reduction for vision transformers: one file a method, all plugged into the one ViT by its field `reduce`."""
