"""What clients send and get: pydantic models."""
