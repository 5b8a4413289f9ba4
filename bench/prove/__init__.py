"""What each issue asked to be shown, as commands that show it: one file per issue."""
