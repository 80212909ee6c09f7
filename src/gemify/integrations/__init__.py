"""GEMs in other frameworks: LangChain, LlamaIndex and vLLM."""
