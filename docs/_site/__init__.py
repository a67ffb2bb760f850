"""What the documentation site has of its own; ``extension`` is what Sphinx loads."""
