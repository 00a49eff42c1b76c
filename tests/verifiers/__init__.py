"""Environments of the package verifiers, which `make verifiers` installs."""
