"""What serves several programs of tools/."""
