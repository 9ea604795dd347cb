"""The losses as users call them: arguments are checked, statistics become a loss, options and labels mean something."""
