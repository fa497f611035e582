"""The teacher pass: every model reads every dialogue once, and its next-token distributions are kept."""

from fusion.teaching.store import DistributionStore, TeacherRows

__all__ = ["DistributionStore", "TeacherRows"]
