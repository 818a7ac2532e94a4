"""Other libraries beside this one: one file a host, imported only when asked for."""
