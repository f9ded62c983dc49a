"""The definition of every op, in plain torch: what each kernel is held against. One file a stem."""
