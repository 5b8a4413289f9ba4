"""The cache room: the control plane of one hypervisor's cache, around the engine (native/)."""
