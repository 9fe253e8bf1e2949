"""Training of one job, called with plain values and a reporter. No database, no queue, no web."""
