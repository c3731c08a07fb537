"""The hooks of ``lowbit.training`` for the trainers of other packages.

Each lies in a module of its own, imported by name, which needs that package: ``lightning`` and ``huggingface``.
"""
