"""llama.cpp beside ours: what it accepts and writes (`compare`), what its rounds cost (`cost`)."""
