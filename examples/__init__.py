"""What can be run as it is: the demo, and how its bundles are made."""
