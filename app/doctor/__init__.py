"""``flatlora doctor``: does everything around this service stand as it needs it, and if not, what
mends it. Each check is a small function that knows no other, and none can hang the rest.
"""
