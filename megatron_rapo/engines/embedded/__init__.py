"""The embedded server, for tests and small models (`megatron_rapo.embedded_server`)."""
