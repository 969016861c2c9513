"""Clarion: job orchestration on PostgreSQL. This package is what a job is, and its HTTP face."""

__version__ = "0.1.0"
