"""MEMORY OF A TRAINING: what layers keep for the backward pass. Imports torch and transformers only."""

from .policy import AppliedMemory, Policy, apply_memory_policy

__all__ = ["AppliedMemory", "Policy", "apply_memory_policy"]
