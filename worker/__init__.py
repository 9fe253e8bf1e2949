"""Claims jobs, supervises one trainer process each, publishes what it made."""
