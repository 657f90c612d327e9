"""Helpers of several test folders lie beside this file: pytest puts its folder on the path."""
