"""What processes share in Redis: the rate limit, dispatch leases, heartbeats, marks, the crash counter and counters."""
