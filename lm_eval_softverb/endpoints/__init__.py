"""Chat models behind one interface: what is asked and answered, what it may cost, and OpenAI-compatible endpoints."""
