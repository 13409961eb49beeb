"""Logs mistakes of an application that lose work or store it too early."""
