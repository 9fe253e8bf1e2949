"""What the client can do, once for both kinds of client."""
