"""Plays server to any worker that speaks HTTP, and says which promises of the protocol it keeps.

Each scenario starts the worker anew against a server of its own, offers it jobs, answers as its script says, and
judges by nothing but the requests that came and how the process ended.
"""
