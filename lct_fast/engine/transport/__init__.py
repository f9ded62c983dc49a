"""What runs between processes: packets, links, ranks, replicas and heartbeats."""
