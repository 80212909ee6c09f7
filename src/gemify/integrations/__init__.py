"""GEMs in other frameworks: LangChain, LlamaIndex, sentence-transformers, TRL and vLLM."""
