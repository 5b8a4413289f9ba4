"""The main job, shown on a real guest: a disk goes in, a guest boots, the cache dies, nothing is lost."""
