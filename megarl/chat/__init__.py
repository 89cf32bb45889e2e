"""Chat templates as text: how a conversation is rendered, and which characters are the assistant's."""
