"""The main job on a real guest: a disk goes in, the cache dies, nothing is lost."""
