"""OpenAI's Responses API: what may be asked, the reply and its events, what is kept, and the endpoints."""
