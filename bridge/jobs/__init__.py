"""Requests that outlive their connection."""
