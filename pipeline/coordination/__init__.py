"""What processes share in Redis: the rate limit, dispatch leases, heartbeats, the crash counter and counters."""
