"""The finished adapter: its folder, its card, and the check that it is what was trained."""
