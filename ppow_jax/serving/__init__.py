"""Servers of language models as their clients see them: HTTP (`connection`), and each kind (`servers`)."""
