"""Settings: schemas, checks that list every problem at once, and the step from Hydra's config to typed settings."""

from fusion.config.errors import EXIT_USER_ERROR, UserError, raise_problems

__all__ = ["EXIT_USER_ERROR", "UserError", "raise_problems"]
