"""GEMs in other frameworks: LangChain, LlamaIndex, sentence-transformers, llm, TRL and vLLM."""
