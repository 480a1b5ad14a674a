"""The values that travel. Each stage adds a new frozen one: AttentionRequest -> Plan -> Answer."""
