"""The base model, its adapter, and how they compute: one place for each kernel and its fallback."""
