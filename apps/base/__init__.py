"""Every room uses this one, which knows nothing of models: files, messages, the machine, quiet libraries, imports."""
