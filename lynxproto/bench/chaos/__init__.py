"""``lynxproto bench chaos``: seeded transfers through a proxy that damages their link, and what became of each.

Each seed states its outcome before it runs (:mod:`.scenario`); :mod:`.proxy` does to the byte streams what the seed
says, :mod:`.transfer` runs both sides and judges. docs/failures.md tells how to read the results.
"""
