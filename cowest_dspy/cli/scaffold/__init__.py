"""A new domain's files, which run at once on scripted models: ``new_domain("tools", "tools")``."""

from cowest_dspy.cli.scaffold.domain import FILES, check_name, new_domain

__all__ = ["FILES", "check_name", "new_domain"]
