from specpass.cli.app import main

main()
