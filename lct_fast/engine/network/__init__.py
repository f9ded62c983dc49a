"""A network cut into groups: their graph, heads, exits and what they carry from batch to batch."""
