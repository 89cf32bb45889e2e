"""Chat templates as text: rendering of conversations, and the character spans of the assistant's turns."""
