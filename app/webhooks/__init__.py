"""Webhooks: a job tells a URL when it begins, writes a checkpoint, pauses and ends.

By the Standard Webhooks specification (https://www.standardwebhooks.com): three headers, an
HMAC-SHA256 over id, time and body, and an id that stays the same at every attempt.

    notices.py     events of jobs with a webhook → rows of ``webhook_deliveries``
    courier.py     rows that are due → sent, and what came of it
    sending.py     one attempt: signed, sent, and its answer
    backoff.py     when the next attempt is
    secrets.py     what the webhooks of a project are signed with
    endpoints.py   the delivery log, the secret, the test button

The row is the truth: a process may die anywhere, and another goes on. Whoever writes events knows
nothing of all this.
"""
