"""HTTP that reaches public addresses only, for URLs that come from outside.

A dataset URI or a webhook names a host, and a name may stand for anything: the cloud's metadata
service, a database beside this one, another address at each look. So the connection itself is what
is guarded: a client of this package has a network backend that looks a name up once, checks every
address that it has got, and connects to one of these very addresses. No request, no redirect and
no second connection gets past it.

    addresses.py   which addresses are public, and every spelling of one
    urls.py        what a URL may look like, before anything is looked up
    backends.py    name → addresses → checked → connection, for threads and for asyncio
    client.py      requests on top: redirects, limits of time and size
    errors.py      why not
"""
